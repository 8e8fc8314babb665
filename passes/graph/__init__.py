"""The captured graph and its memory: capture, normalize, propagate, liveness. Imports the runtime and machine/."""
