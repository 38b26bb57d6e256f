"""The rollout engine: paged KV, sampling on the device, rounds of decoding, admission by free pages."""
