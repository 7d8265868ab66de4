"""Which weights stay on the device, which are streamed, and from where. Figures only."""
