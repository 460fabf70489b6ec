"""The computer that a job runs on: memory, heap, precision of arithmetic, devices."""
