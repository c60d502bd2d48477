"""Library behind the scripts: plain values in, tested answers out."""
