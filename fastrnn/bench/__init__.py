"""`python -m fastrnn.bench`: times a shape of your own, and what the benchmarks share."""
