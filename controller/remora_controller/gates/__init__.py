"""Gates: what has to hold while a release serves. Pure but for `evidence`, which keeps samples."""
