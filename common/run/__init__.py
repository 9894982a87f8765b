"""What every run shares: its options, its errors, its processes."""
