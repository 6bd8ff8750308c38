// Which probabilities dropout keeps: the bits of jax_gluon/_dropout.py.
#pragma once

#include "operands.h"

// Of one row of one head.
struct Dropout {
  uint threshold;  // 0: all are kept
  uint2 key;
  uint batch;
  uint head;
  uint row;
  int first_key;

  // Philox4x32-7 (Salmon et al., SC 2011) of the counter that key `token` shares with seven others
  // has 16 bits for each of them.
  bool keeps(int token) const thread {
    if (threshold == 0) return true;
    token += first_key;
    uint4 x = uint4(uint(token / 64 * 8 + token % 8), row, head, batch);
    uint2 k = key;
    for (int round = 0; round < 7; ++round) {
      const uint high0 = mulhi(0xD2511F53u, x.x), low0 = 0xD2511F53u * x.x;
      const uint high1 = mulhi(0xCD9E8D57u, x.z), low1 = 0xCD9E8D57u * x.z;
      x = uint4(high1 ^ x.y ^ k.x, low1, high0 ^ x.w ^ k.y, low0);
      k += uint2(0x9E3779B9u, 0xBB67AE85u);
    }
    const int slot = token / 8 % 8;
    const uint word = slot < 4 ? (slot < 2 ? x.x : x.y) : (slot < 6 ? x.z : x.w);
    return (slot % 2 == 0 ? word & 0xFFFFu : word >> 16) >= threshold;
  }
};
