"""torch.compile: inside a plan, around a streamed module, and as its backend."""
