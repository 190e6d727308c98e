"""The XNNPACK CPU target."""
