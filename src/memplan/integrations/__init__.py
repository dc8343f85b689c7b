"""Where memplan meets running training scripts: objects of transformers, accelerate, peft and torch."""
