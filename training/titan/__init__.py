"""The backend torchtitan: its trainer runs a stage of moec. Everything in here but `device.py` imports torchtitan."""
