"""Golden prompts: what the exported graph itself answers, recorded a layer at a time."""
