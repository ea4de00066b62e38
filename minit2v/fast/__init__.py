"""stub"""
def door(network):
    return network
def optimize(network, graphs=False, compile=False): pass
def restore(network): pass
