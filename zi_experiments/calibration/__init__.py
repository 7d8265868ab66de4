"""What this machine was measured to do: rates, kept from one run to the next."""
