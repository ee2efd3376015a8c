"""SGLang servers as rollout engines: not built yet, and `miles.engines.check` says so before anything starts."""
