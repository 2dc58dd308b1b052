"""The speed harness: fixed request sets, ceilings of the machine, and a correctness check in the same run as every figure."""
