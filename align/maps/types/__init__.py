"""One record for each type of map, each in a module of its own, named ``TYPE``; see :mod:`align.maps.registry`."""
