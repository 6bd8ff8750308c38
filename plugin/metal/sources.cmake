# The Metal host code, of both builds.
set(host_sources archive.mm attention_encoder.mm buffers.mm commands.mm context.mm device.mm pins.mm
                 quantize_encoder.mm)
