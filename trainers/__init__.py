"""What runs inside a rank. Never imports launcher; heavy imports happen inside functions."""
