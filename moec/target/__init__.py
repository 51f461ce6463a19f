"""What a machine can do: read by kernels, and by the runtime before it runs any."""
