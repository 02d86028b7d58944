"""The HTTP faces: what comes in becomes a call, what the call's log says goes out."""
