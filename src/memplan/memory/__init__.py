"""How the bytes of a step live and die: timelines, optimizers, loading, the allocator and the runtime."""
