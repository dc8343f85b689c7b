"""The files that configure an engine, read into specs and written: DeepSpeed's, accelerate's, a run's folder."""
