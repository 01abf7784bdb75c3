"""What answers mean: reading written answers, the benchmarks' rules, rewards, statistics. No torch."""
