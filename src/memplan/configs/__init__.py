"""The files that configure an engine, read into specs and written: a DeepSpeed JSON, an accelerate YAML, a run's folder."""
