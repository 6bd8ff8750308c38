"""What several tests need: oracles, cases and programs."""
