"""Models in onnxruntime and OpenVINO: conversion, and forward passes for timing. `export` writes files that they run."""
