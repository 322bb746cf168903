"""What the command line says; read by cli.py."""
