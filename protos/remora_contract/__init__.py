"""What two processes must agree on: errors, digests, documents, names, compatibility.

Pure: no I/O beyond reading a directory it is handed, no clock, no threads; numpy at most.
"""
