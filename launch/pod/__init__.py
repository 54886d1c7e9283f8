"""What `launch/tpu.sh` decides: a slice, its workers, a run on them."""
