"""What a device's kernels allocate for themselves, and what time costs there. Imports the runtime and operators/."""
