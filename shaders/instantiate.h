// Makes kernels of their templates, under the name by which the host asks for them:
// NAME_TYPE_DIM, where TYPE is the element of the matrices and DIM the widest head.
#pragma once

#define JAX_GLUON_INSTANTIATE(name, type, dim) \
  template [[host_name(#name "_" #type "_" #dim)]] kernel decltype(name<type, dim>) name<type, dim>;

#define JAX_GLUON_INSTANTIATE_ALL(name, type) \
  JAX_GLUON_INSTANTIATE(name, type, 64)       \
  JAX_GLUON_INSTANTIATE(name, type, 128)      \
  JAX_GLUON_INSTANTIATE(name, type, 256)
