"""Files and folders, on a disk or in a bucket of Google Cloud Storage."""
