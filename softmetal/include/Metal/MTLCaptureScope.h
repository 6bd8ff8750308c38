#pragma once

#import <Metal/MTLCaptureManager.h>
