"""The command line, the model catalogue, reports, benchmarks and the demo."""
