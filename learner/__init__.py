"""The mathematics of SafeDreamer in JAX and the loop that trains it."""
