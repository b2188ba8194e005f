"""What is measured: MACs, speed, samples, their quality and step losses."""
