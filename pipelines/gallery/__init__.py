"""The built-in demo: real captioned images, served over HTTP on loopback with the web's faults."""
