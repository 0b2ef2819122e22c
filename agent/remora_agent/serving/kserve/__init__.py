"""The KServe v2 surface (inference.GRPCInferenceService), as Triton's clients speak it."""
