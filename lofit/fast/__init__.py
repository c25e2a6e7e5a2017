"""What only saves time. Each part has a plain twin, and tests hold both equal."""
