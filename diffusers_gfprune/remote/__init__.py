"""Files shipped byte for byte inside saved repositories: they import the standard library, torch and Diffusers only."""
