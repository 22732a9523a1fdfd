"""What things cost, one question a file: `python -m benchmarks.watch` and so on; `--quick` tries it out."""
