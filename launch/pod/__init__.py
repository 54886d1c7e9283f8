"""The logic of `launch/tpu.sh`: a TPU slice, its workers and a run on them."""
