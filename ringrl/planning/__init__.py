"""What fits where, before the machine is rented: the real step compiled ahead of time, and a closed form beside it."""
