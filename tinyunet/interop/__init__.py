"""Models out of and into other programs' files: Keras, PyTorch, safetensors, ONNX.

    ``layers``        a net as a list of layers in the order in which they run: what all formats share
    ``torch_files``   PyTorch state dicts and safetensors
    ``keras_files``   ``.keras`` and ``.h5``
    ``onnx_files``    ONNX, a graph that other programs run; ``onnx_reading`` reads it
    ``recognition``   finds the U-Net in a graph of Keras or ONNX; ``graph_checks`` are checks of its layers
    ``formats``       which of these a file is, by its ending: start here

Each format's package is imported when a file of it is read or written. Numbers of the task (sequences,
classes, voxels) go along where a format has room for text.
"""
