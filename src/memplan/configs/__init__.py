"""The files that configure an engine, read into specs: a DeepSpeed JSON, an accelerate YAML."""
