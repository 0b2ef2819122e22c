"""Generated protocol code and the .proto files it comes from; nothing else lives here."""
