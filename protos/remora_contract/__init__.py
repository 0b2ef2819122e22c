"""What two processes must agree on: errors, digests, documents, names, compatibility.

Pure: no I/O beyond reading a directory it is handed, no clock, no threads; numpy at most.
"""

# Of all that this repository installs; packaging reads it from here. The installed package's
# metadata would say the same, after a tenth of the time that a conversion takes.
__version__ = "0.1.0"
