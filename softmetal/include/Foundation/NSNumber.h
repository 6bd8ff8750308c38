#pragma once

#import <Foundation/NSValue.h>
