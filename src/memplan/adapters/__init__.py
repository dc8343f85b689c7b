"""What a model is given before it runs: adapters and quantized weights."""
