"""What encoders and probes are measured by."""
