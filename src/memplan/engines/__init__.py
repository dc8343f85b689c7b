"""Who holds which state, where and when."""
