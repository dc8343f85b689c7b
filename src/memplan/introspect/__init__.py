"""The real model under FakeTensor, for what no architecture file says."""
