"""On-device agent: reconcile, engines, adapter bank, scheduler, serving, telemetry."""
